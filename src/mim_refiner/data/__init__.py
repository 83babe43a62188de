"""Image sources, decoding, multi-crop views, photometric augmentations and batches."""
