// The service's routes, as this page calls them.

const UNREACHABLE = "The service cannot be reached.";
const CUT_OFF = "The connection ended before the picture came.";

/** A request that ended other than well, with what the service said of it. */
export class ServiceError extends Error {
  constructor(told, status = 0) {
    super(told.detail);
    this.code = told.code;
    this.retryable = told.retryable;
    this.retryAfterS = told.retry_after_s ?? null;
    this.status = status;
    this.field = /\((\w+)\)$/.exec(told.detail)?.[1] ?? null;
    this.sentence = told.detail.replace(/ \(\w+\)$/, "");
  }
}

/** What the page must know of the service, and how it is. */
export async function readSettings() {
  const response = await ask("/page/settings");
  return response.json();
}

/** The PNG of the automatic mask of a photo. */
export async function readMask(form, key, signal) {
  const response = await ask("/api/mask", { method: "POST", body: form, headers: keyHeader(key), signal });
  return response.blob();
}

/** The result of a try-on; `onStep` is told (steps done, steps in all), first with none done. */
export async function tryOn(form, key, signal, onStep) {
  const response = await ask("/api/try-on/stream", { method: "POST", body: form, headers: keyHeader(key), signal });
  let last = null; // read to the end of the stream: the browser takes what is left for given up
  for await (const event of events(response, signal)) {
    last = event;
    if (event.name === "progress") onStep(event.payload.done, event.payload.total);
  }
  if (last?.name === "result") return last.payload;
  throw last?.name === "error" ? new ServiceError(last.payload, response.status) : outage(CUT_OFF);
}

function keyHeader(key) {
  return key ? { "X-API-Key": key } : {};
}

function outage(detail) {
  return new ServiceError({ detail, code: "unreachable", retryable: true });
}

async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    throw options.signal?.aborted ? error : outage(UNREACHABLE);
  }
  if (response.ok) return response;
  const told = await response.json().catch(() => ({}));
  const after = Number(response.headers.get("Retry-After"));
  throw new ServiceError(
    {
      detail: told.detail ?? told.error?.message ?? `The service answered ${response.status}.`,
      code: told.code ?? told.error?.code ?? "internal",
      retryable: told.retryable ?? response.status >= 500,
      retry_after_s: after || null,
    },
    response.status,
  );
}

async function* events(response, signal) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  const pieces = []; // of the event that is arriving: a picture comes in many
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      pieces.push(value);
      if (!value.includes("\n")) continue;
      const blocks = pieces.splice(0).join("").split("\n\n");
      pieces.push(blocks.pop());
      for (const block of blocks) {
        const lines = block.split("\n");
        const name = lines.find((line) => line.startsWith("event: "));
        const line = lines.find((line) => line.startsWith("data: "));
        if (name && line) yield { name: name.slice(7), payload: JSON.parse(line.slice(6)) };
      }
    }
  } catch (error) {
    throw signal.aborted ? error : outage(CUT_OFF);
  } finally {
    reader.cancel().catch(() => {});
  }
}
