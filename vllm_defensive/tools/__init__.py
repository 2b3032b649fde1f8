"""Commands: the planner, and what an audit shows."""
