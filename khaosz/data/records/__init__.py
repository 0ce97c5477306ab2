"""Records of text, chats, preferences and text pairs, read from files of the common layouts."""
