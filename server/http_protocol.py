"""uvicorn's HTTP over httptools, with a limit on headers, which it has none of, and errors in our words."""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.errors import ApiError

MAX_HEADER_NBYTES = 64 * 1024  # request line and headers


class HttpProtocol(HttpToolsProtocol):
    """431 for headers that are too long, before they are kept; 400 for what is no HTTP."""

    _header_nbytes = 0  # that the parser has given
    _num_pending = 0  # bytes since the request began
    _is_in_headers = True

    def data_received(self, data: bytes) -> None:
        if self._is_in_headers:
            self._num_pending += len(data)
        super().data_received(data)
        if self._is_in_headers and self._num_pending > MAX_HEADER_NBYTES:
            self._refuse_headers()

    def on_message_begin(self) -> None:
        self._header_nbytes = 0
        self._is_in_headers = True
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._header_nbytes += len(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_nbytes += len(name) + len(value) + 4
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._is_in_headers = False
        self._num_pending = 0
        if self._header_nbytes > MAX_HEADER_NBYTES:
            self._refuse_headers()
        else:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._is_in_headers = True  # of the next one
        if not self.transport.is_closing():
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, "this is not a valid HTTP request", code="invalid_http"), b"Bad Request")

    def _refuse_headers(self) -> None:
        error = ApiError(431, f"the headers are longer than {MAX_HEADER_NBYTES} bytes", code="headers_too_large")
        self._refuse(error, b"Request Header Fields Too Large")

    def _refuse(self, error: ApiError, reason: bytes) -> None:
        if self.transport.is_closing():
            return
        body = error.json()
        head = b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
        self.transport.write(head % (error.status, reason, len(body)) + body)
        self.transport.close()
