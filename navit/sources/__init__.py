"""Where images and captions lie, and the sizes of the images."""
