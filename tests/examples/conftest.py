"""Generated images and a checkpoint, and the folders whose programs are run on the path."""

from examples.generated import checkpoint, idx, root  # noqa: F401  # fixtures
