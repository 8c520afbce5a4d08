"""Takes requests, checks them and hands them to the workers. Never imports torch."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("image-generation-inference")
except PackageNotFoundError:  # run from a folder that was never installed
    VERSION = "0"
