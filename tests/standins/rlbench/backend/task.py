"""What tasks are made of."""


class Task:
    """A task with some variations."""

    variations = 1

    def __init__(self, pyrep: object, robot: object, name: str | None = None) -> None:
        self.held = (pyrep, robot)
        self.name = name or type(self).__module__.rpartition(".")[2]

    def get_name(self) -> str:
        """The name of its file."""
        return self.name

    def variation_count(self) -> int:
        """How many there are."""
        return self.variations
