"""Builds one LLaVA JSON from annotation files of many kinds: `fastllava mix`."""
