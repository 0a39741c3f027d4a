"""Boards: arms of any number of runs and studies as rows, a metric of a task as a column."""
