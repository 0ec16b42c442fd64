"""What `atoken data show` is made of: samples measured, figures, plots, and sheets of pictures with their captions."""
