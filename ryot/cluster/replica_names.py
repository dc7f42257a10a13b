"""The replicas as the router saw them last, in the gateway's process.

Ray copies the classes of router and gateway, each with names of its own; a module is the same for both.
"""

KNOWN: list[str] = []
