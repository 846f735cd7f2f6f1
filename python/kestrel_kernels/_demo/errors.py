"""What ends the demo with one line and exit status 2."""


class DemoError(Exception):
    pass
