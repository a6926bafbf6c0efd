"""Scores of the task `reports`."""


def contains(doc: dict, results: list[str]) -> dict[str, float]:
    """Whether the answer has one of the right answers in it."""
    return {"contains": float(any(answer.lower() in results[0].lower() for answer in doc["answers"]))}
