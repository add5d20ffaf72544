#!/bin/sh
# HAProxy as Ray starts it, by `haproxy -db -f FILE ...`, once FILE says what Ray's variables cannot.
set -e
chmod 700 "$(dirname "$3")"  # there is a socket that takes commands

# Its pages of figures are for this machine. A body is waited for, a second at most, and goes on as it comes where it is
# longer than what is held: HAProxy asks again only what it holds whole. Heads need some of the buffer. Of a machine that
# loses its power nothing is heard: it is asked whether it is there.
sed -i -f - "$3" <<EDITS
s/^ *bind \*:$RAY_SERVE_HAPROXY_STATS_PORT$/  bind 127.0.0.1:$RAY_SERVE_HAPROXY_STATS_PORT/
s/^ *bind :$RAY_SERVE_HAPROXY_METRICS_PORT$/    bind 127.0.0.1:$RAY_SERVE_HAPROXY_METRICS_PORT/
/^defaults$/a\\
    option srvtcpka\\
    srvtcpka-idle 5s\\
    srvtcpka-intvl 5s\\
    srvtcpka-cnt 3\\
    default-server tcp-ut 15s
/^frontend http_frontend$/,/bind/ {
/bind/a\\
    tcp-request inspect-delay 1000ms\\
    tcp-request content set-var(txn.body) req.body_size\\
    tcp-request content accept if { req.body_len,sub(txn.body) eq 0 }\\
    tcp-request content accept if { req.body_size gt $((RAY_SERVE_HAPROXY_TUNE_BUFSIZE - 65536)) }\\
    tcp-request content accept if WAIT_END
}
EDITS

# It would outlive a manager that is killed, and hold the port.
exec $(command -v setpriv >/dev/null && echo setpriv --pdeathsig KILL) "$HELIOSTAT_HAPROXY" "$@"
