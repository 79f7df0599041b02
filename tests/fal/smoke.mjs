// One client by one recipe in Node: node smoke.mjs CLIENT RECIPE [SERVER]; prints what worked.

import { follow } from "./recipes.mjs";
import { smoke } from "./surfaces.mjs";

const [name, recipe, server] = process.argv.slice(2);
const { default: module } = await import({ v1: "@fal-ai/client", v0: "fal-v0", v06: "fal-v06" }[name]);
console.log(JSON.stringify(await smoke(...follow(recipe, name, module, server))));
process.exit(); // the clients' token timers would hold us for two minutes
