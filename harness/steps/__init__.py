"""A unit of work: its identity, its folder, its durable files. Knows no kind of step."""
