"""Anthropic's Messages API: `messages` translates requests, `output` answers, `schema` has both."""
