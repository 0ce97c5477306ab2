"""Models that can be served without a restart: `rows` lists the catalogue and what is on this
machine, `pulls` fetches and adds them in the background, `routes` answers requests for both."""
