"""The network service: routes, the machines that live behind them, and the command line."""

__version__ = "0.1.0"
