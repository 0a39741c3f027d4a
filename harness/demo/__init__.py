"""A tiny world of its own, from start to leaderboard."""
