"""A web page on which a model segments pictures: `space` starts it, here and on a Hugging Face Space."""
