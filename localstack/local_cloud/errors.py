"""What can go wrong with the local cloud."""


class CloudError(Exception):
    """The local cloud cannot be brought up or taken down; the message is one line that names what to fix."""
