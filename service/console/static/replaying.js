// From a file to the id of its result: what it is sent as, its progress, and how it is called off.

import * as api from "./api.js";
import { bytes, count, seconds, short } from "./format.js";

const BY_NAME = {
  ".parquet": "application/vnd.apache.parquet",
  ".arrow": "application/vnd.apache.arrow.stream",
  ".arrows": "application/vnd.apache.arrow.stream",
  ".ndjson": "application/x-ndjson",
  ".jsonl": "application/x-ndjson",
  ".json": "application/json",
};

/** How a file is sent: its media type, and the query that says what is in it. */
export function sentAs(name, { format = "", record = "" } = {}) {
  const suffix = /\.[a-z0-9]+$/i.exec(name)?.[0].toLowerCase() ?? "";
  if (record) return { media: "application/octet-stream", query: { record } };
  if (format) return { media: "application/octet-stream", query: { format } };
  if (BY_NAME[suffix]) return { media: BY_NAME[suffix], query: {} };
  return { media: "application/octet-stream", query: { format: "auto" } };
}

// Bytes of a record, about; and in how many parts of the trace its map is told apart.
const RECORD_BYTES = { ".parquet": 2, ".arrow": 9, ".arrows": 9 };
const BUCKETS = 250;

/** The query that keeps where a trace of this file writes, by parts of it. */
export function keeping(file) {
  const suffix = /\.[a-z0-9]+$/i.exec(file.name)?.[0].toLowerCase() ?? "";
  return { footprint: "spans", footprint_by: `records:${Math.max(1, Math.ceil(file.size / (RECORD_BYTES[suffix] ?? 20) / BUCKETS))}` };
}

const pause = (milliseconds, signal) => new Promise((resolve, reject) => {
  const timer = setTimeout(resolve, milliseconds);
  signal?.addEventListener("abort", () => { clearTimeout(timer); reject(new DOMException("cancelled", "AbortError")); }, { once: true });
});

/** Replay `file` on a machine; the id of the trace. `cancel`, an AbortSignal, stops the upload or the job. */
export async function replayFile(vm, file, options, { signal, cancel, progress }) {
  const { media, query } = sentAs(file.name, options);
  const wanted = new URLSearchParams({ ...query, ...Object.fromEntries(Object.entries(options.query ?? {}).filter(([, value]) => value)) });
  const stop = cancel && signal ? AbortSignal.any([cancel, signal]) : (cancel ?? signal);
  const { document } = await api.upload(`/v1/vms/${vm}/traces?${wanted}`, file, {
    headers: { "Content-Type": media, Prefer: "respond-async" },
    signal: stop,
    progress: (done, total) => progress?.({ part: total ? done / total : null, text: done < total ? `Sending ${bytes(done)} of ${bytes(total)}` : "Received; waiting for its turn" }),
  });
  if (document.id?.startsWith("tr_")) return document.id;
  return followJob(document, { signal, cancel, progress });
}

/** Follow a job to its end: the id of its trace. Leaving the page leaves the job; `cancel` cancels it. */
export async function followJob(job, { signal, cancel, progress }) {
  let asked = false;
  for (;;) {
    if (cancel?.aborted && !asked) {
      asked = true;
      job = await api.call("POST", `/v1/jobs/${job.id}:cancel`, {});
    }
    if (job.state === "succeeded") {
      if (!job.result) throw new api.Problem({ title: "The result is not kept any more", detail: "The replay is committed, but the machine keeps only so many results." }, 404);
      return job.result.split("/").pop();
    }
    if (job.state === "cancelled") throw new DOMException("cancelled", "AbortError");
    if (job.state === "failed" || job.state === "interrupted") throw new api.Problem(job.error ?? { title: `The replay was ${job.state}` }, job.error?.status ?? 0);
    const total = job.eta && job.rate ? job.records_done + job.eta * job.rate : null;
    progress?.({
      part: total ? job.records_done / total : null,
      text: job.state === "queued" ? "Waiting for its turn" : `${count(job.records_done)} records replayed${job.rate ? `, ${short(job.rate)} a second` : ""}${job.eta ? `, ${seconds(job.eta)} to go` : ""}`,
    });
    await pause(250, signal);
    try {
      job = await api.get(`/v1/jobs/${job.id}`, { signal });
    } catch (error) {
      if (error.code !== "unreachable") throw error;
      progress?.({ part: null, text: "The service does not answer; looking again" });
      await pause(1500, signal);
    }
  }
}
