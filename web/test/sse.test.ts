import { expect, test } from "vitest";
import { events } from "../src/sse";

const bytes = new TextEncoder();

function streamOf(parts: Uint8Array[], onCancel = () => {}): ReadableStream<Uint8Array> {
  const queue = [...parts];
  return new ReadableStream({
    pull(controller) {
      const next = queue.shift();
      if (next) controller.enqueue(next);
      else controller.close();
    },
    cancel: onCancel,
  });
}

async function read(parts: Uint8Array[]): Promise<string[]> {
  const received: string[] = [];
  for await (const data of events(streamOf(parts))) received.push(data);
  return received;
}

const text = 'data: {"a": "你好 🌊"}\n\ndata: two\ndata: lines\r\n\r\n: comment\n\nevent: x\ndata:tight\n\ndata: [DONE]\n\n';
const expected = ['{"a": "你好 🌊"}', "two\nlines", "tight", "[DONE]"];

test("chunks may end anywhere", async () => {
  const all = bytes.encode(text);
  expect(await read([all])).toEqual(expected);
  expect(await read([...all].map((byte) => Uint8Array.of(byte)))).toEqual(expected);
  for (let cut = 0; cut < all.length; cut++) {
    // A cut within \r\n must not count as two line endings.
    expect(await read([all.slice(0, cut), all.slice(cut)])).toEqual(expected);
  }
});

test("the last event needs no blank line", async () => {
  expect(await read([bytes.encode("data: a\n\ndata: b")])).toEqual(["a", "b"]);
});

test("leaving the loop cancels the stream", async () => {
  let cancelled = false;
  const part = bytes.encode("data: a\n\n"); // several, so that the stream is still open
  const stream = streamOf([part, part, part, part], () => (cancelled = true));
  for await (const _ of events(stream)) break;
  expect(cancelled).toBe(true);
});
