"""TFDS builders that ship with the package. Importing a module registers its builder."""
