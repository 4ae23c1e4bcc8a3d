"""The websocket server and its page; it knows a policy by its interface alone."""
