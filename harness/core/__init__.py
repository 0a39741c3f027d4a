"""Words that everybody uses: errors, configuration, specs, records, text, statistics."""
