"""Knowledge bases over HTTP: what is kept, files that come in, one base at work, the routes."""
