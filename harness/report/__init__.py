"""Records into text, pages and comparisons. No torch; knows no kind of step."""
