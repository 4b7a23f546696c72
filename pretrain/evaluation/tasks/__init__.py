"""Task files for lm-evaluation-harness, `lm_eval --include_path`; what they call is in scoring.py and lab.py."""
