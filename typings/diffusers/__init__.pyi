# Seen as untyped: the package's own annotations contradict its documented use (tuple[int] for tuples of any length,
# unions that every caller would have to take apart).
from typing import Any

def __getattr__(name: str) -> Any: ...  # noqa: ANN401
