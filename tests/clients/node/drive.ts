// The main job with generated types: a machine, an object to protect, a trace, what would have exited.
//
//     node out/drive.js URL TOKEN TRACE.parquet
//
// The file has the trace that is sent as JSON. Throws at what it does not expect and prints the figures as JSON.

import createClient from "openapi-fetch";
import { readFile } from "node:fs/promises";
import type { components, paths } from "./subpage";

type Exit = components["schemas"]["ExitRecord"];

const TABLE = 0x2000360;

function expect(truth: boolean, what: unknown): asserts truth {
  if (!truth) throw new Error(JSON.stringify(what));
}

async function main(baseUrl: string, token: string, parquet: string): Promise<Record<string, number>> {
  const client = createClient<paths>({ baseUrl, headers: { Authorization: `Bearer ${token}` } });

  const made = await client.POST("/v1/vms", {
    body: { name: "generated", vcpus: 2, spp: true, memory_slots: [{ slot: 0, gpa: 0, size: "0x40000000" }] },
  });
  expect(made.data !== undefined, made.error);
  const path = { vm: made.data.id };

  const objects = [{ name: "sys_call_table", gpa: TABLE, size: 3616 }];
  const wanted = { params: { path }, body: { name: "kernel", objects } };
  const shown = await client.POST("/v1/vms/{vm}/protections", wanted);
  expect(shown.data?.objects[0]?.gpa === "0x2000360", shown.error);
  const again = await client.POST("/v1/vms/{vm}/protections", wanted);
  expect(again.error?.status === 409, again.data);

  const accesses = [TABLE, TABLE - 0x40, TABLE - 0x300, 0x1000].map((gpa) => ({ gpa }));
  const replayed = await client.POST("/v1/vms/{vm}/traces", {
    params: { path, query: { on_violation: "skip" } },
    body: { accesses },
  });
  const result = replayed.data;
  // Without a preference the replay is answered, and not accepted as a job.
  expect(result !== undefined && "by_object" in result, replayed.error ?? result);
  expect(result.by_object["sys_call_table"]?.collateral === 1, result);

  const exits = await client.GET("/v1/vms/{vm}/traces/{trace}/exits", {
    params: { path: { ...path, trace: result.id } },
    headers: { Accept: "application/json" },
  });
  expect(typeof exits.data === "object" && exits.data !== null && "exit_records" in exits.data, exits.error);
  const records: Exit[] = exits.data.exit_records;
  expect(records.length === 2 && records[0]?.gpa === "0x2000360" && records[0].gva === null, records);

  const columns = await client.POST("/v1/vms/{vm}/traces", {
    params: { path },
    headers: { "Content-Type": "application/vnd.apache.parquet" },
    body: new Blob([await readFile(parquet)]),
    bodySerializer: (body) => body,
  });
  expect(columns.data !== undefined && "by_object" in columns.data, columns.error ?? columns.data);
  expect(columns.data.violations === result.violations && columns.data.records === result.records, columns.data);

  const stream = await client.GET("/v1/vms/{vm}/traces/{trace}/exits", {
    params: { path: { ...path, trace: columns.data.id } },
    headers: { Accept: "application/vnd.apache.arrow.stream" },
    parseAs: "blob",
  });
  expect(stream.data instanceof Blob && stream.data.size > 0, stream.error);

  const deleted = await client.DELETE("/v1/vms/{vm}", { params: { path } });
  expect(deleted.response.status === 204, deleted.error);
  const gone = await client.GET("/v1/vms/{vm}", { params: { path } });
  expect(gone.error?.field === "vm", gone.data);
  return { records: result.records, violations: result.violations, page: result.page_granular_violations };
}

const [url = "", token = "", parquet = ""] = process.argv.slice(2);
console.log(JSON.stringify(await main(url, token, parquet)));
