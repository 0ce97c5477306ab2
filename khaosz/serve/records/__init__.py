"""What the page keeps and shows beside models and documents: conversations, preferences, and a look
at training runs.
"""
