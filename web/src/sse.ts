/** Server-sent events out of bytes that may be cut anywhere, also amid a character. */

export async function* events(body: ReadableStream<Uint8Array>): AsyncGenerator<string> {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let held = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      held += done ? decoder.decode() : decoder.decode(value, { stream: true });
      // An event ends with a blank line, whichever of the three line ends is used.
      const parts = held.split(/\r\n\r\n|\n\n|\r\r/);
      held = parts.pop() ?? "";
      for (const part of parts) {
        const data = dataOf(part);
        if (data !== null) yield data;
      }
      if (done) {
        const data = dataOf(held);
        if (data !== null) yield data;
        return;
      }
    }
  } finally {
    // Also when whoever reads leaves: the server then frees the place.
    await reader.cancel().catch(() => undefined);
  }
}

function dataOf(event: string): string | null {
  const lines = event
    .split(/\r\n|\n|\r/)
    .filter((line) => line === "data" || line.startsWith("data:"))
    .map((line) => line.slice(5).replace(/^ /, ""));
  return lines.length ? lines.join("\n") : null;
}
