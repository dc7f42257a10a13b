"""What runs on a device while something is pushed to it: Python's standard library and a few modules of `ryot.edge`.

It is sent as one zip file over the connection and leaves nothing of itself behind.
"""
