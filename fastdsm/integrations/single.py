"""The one case that every integration refuses: a single query."""

from __future__ import annotations


def check_queries(queries: int, keys: int, n_iters: int, where: str, remedy: str) -> None:
    """One query over several keys has one doubly-stochastic plan, the uniform one, whatever it asks for."""
    if n_iters > 0 and queries == 1 < keys:
        raise ValueError(
            f"{where} attends from one query to {keys} keys, and the only plan of one line is the uniform one: its output "
            f"would be the mean of the values, whatever the query is; {remedy}"
        )
