"""What is asked: task YAML into questions."""
