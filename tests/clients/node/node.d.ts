// What drive.ts takes of node: nothing else of it is known to the compiler.

declare module "node:fs/promises" {
  export function readFile(path: string): Promise<Uint8Array<ArrayBuffer>>;
}
declare const process: { argv: string[] };
