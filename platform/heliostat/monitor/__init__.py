"""Watching from outside: Prometheus on this machine, and the dashboards that Grafana shows of what it holds."""
