"""OpenAI's protocol in front of an engine: what may be asked, and what answers look like."""
