import { expect, test } from "vitest";
import { events } from "../src/sse";

const bytes = new TextEncoder();

function streamOf(parts: Uint8Array[], onCancel = () => {}): ReadableStream<Uint8Array> {
  const left = [...parts];
  return new ReadableStream({
    pull(controller) {
      const next = left.shift();
      if (next) controller.enqueue(next);
      else controller.close();
    },
    cancel: onCancel,
  });
}

async function read(parts: Uint8Array[]): Promise<string[]> {
  const found: string[] = [];
  for await (const data of events(streamOf(parts))) found.push(data);
  return found;
}

const text = 'data: {"a": "你好 🌊"}\n\ndata: two\ndata: lines\r\n\r\n: comment\n\nevent: x\ndata:tight\n\ndata: [DONE]\n\n';
const expected = ['{"a": "你好 🌊"}', "two\nlines", "tight", "[DONE]"];

test("whole, byte by byte, and cut in two anywhere", async () => {
  const all = bytes.encode(text);
  expect(await read([all])).toEqual(expected);
  expect(await read([...all].map((byte) => Uint8Array.of(byte)))).toEqual(expected);
  for (let cut = 0; cut < all.length; cut++) {
    // A line end of two letters cut in its middle must not count as two.
    expect(await read([all.slice(0, cut), all.slice(cut)])).toEqual(expected);
  }
});

test("what comes last without a blank line is an event too", async () => {
  expect(await read([bytes.encode("data: a\n\ndata: b")])).toEqual(["a", "b"]);
});

test("who leaves cancels the stream", async () => {
  let cancelled = false;
  const part = bytes.encode("data: a\n\n"); // a few, so that it has not ended by itself
  const stream = streamOf([part, part, part, part], () => (cancelled = true));
  for await (const _ of events(stream)) break;
  expect(cancelled).toBe(true);
});
