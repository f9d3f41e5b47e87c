"""Data: what a run is fed with.

datasets       builders of datasets that packages carry
examples       the kinds of examples: images, and windows of text
pipeline       TFDS through Grain: sharded, and resumed at any step
augmentations  what training does to images on the host
batches        a user's own batches
"""
