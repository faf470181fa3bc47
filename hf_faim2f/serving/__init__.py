"""A web page on which a model segments images, which `space` starts, and the inference server of `faim2f serve`."""
