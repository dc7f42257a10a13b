"""From the desk to many devices over the system's OpenSSH, by a small program sent along: `ryot.fleet.device`."""
