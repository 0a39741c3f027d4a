"""Attack success: refusal rules, classifiers and judges."""
