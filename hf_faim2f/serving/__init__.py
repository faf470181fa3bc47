"""A web page on which pictures are segmented; `web.py` puts it together, and is the file of a Space, too."""
