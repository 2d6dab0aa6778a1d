"""The page of the server: a chat, and live what the machine does."""
