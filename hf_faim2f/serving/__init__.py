"""The web page of `faim2f app`, on which a model segments images, and the inference server of `faim2f serve`."""
