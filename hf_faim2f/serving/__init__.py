"""A web page on which a model segments images. `space` starts it, locally or on a Hugging Face Space."""
