"""Zero-shot evaluation of anything that clipkd loads: tasks, features, metrics, results, comparisons."""
