"""TFDS builders that ship with the package; importing a module registers its own."""
