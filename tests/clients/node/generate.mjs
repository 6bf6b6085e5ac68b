// Types for TypeScript of the contract: node generate.mjs openapi.json subpage.d.ts
//
// As openapi-typescript makes them, but for bytes: those are a Blob, which fetch takes and gives, and no string. Defaults
// of requests are for the service to fill in; in replies every member is required anyway.

import { readFile, writeFile } from "node:fs/promises";
import openapiTS, { astToString } from "openapi-typescript";
import ts from "typescript";

const [contract, types] = process.argv.slice(2);
const blob = ts.factory.createTypeReferenceNode("Blob");
const ast = await openapiTS(await readFile(contract, "utf-8"), {
  defaultNonNullable: false,
  transform: (schema) => (schema.format === "binary" ? blob : undefined),
});
await writeFile(types, astToString(ast));
