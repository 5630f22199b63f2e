// Checks a document with AsyncAPI's own parser: no error and no warning, and a mistake is noticed. Use: node asyncapi.cjs FILE
const { readFileSync } = require('node:fs');
const { Parser } = require('@asyncapi/parser');

// 0 is an error, 1 a warning; the rest are hints, such as that there is a later version of AsyncAPI.
const faults = async (text) => (await new Parser().parse(text)).diagnostics.filter(({ severity }) => severity <= 1);

async function main(file) {
  const text = readFileSync(file, 'utf8');
  const found = await faults(text);
  for (const { code, message, path } of found) console.error(`${file}: ${path.join('.')}: ${message} (${code})`);
  if (found.length > 0) process.exit(1);
  for (const mistake of [
    text.replace('is: routingKey', 'is: letterbox'),
    text.replace('$ref: \'#/components/messages/user-created\'', '$ref: \'#/components/messages/user-mislaid\''),
    text.replace('action: send', 'action: shout'),
    text.replace('type: object', 'type: objekt'),
  ]) {
    if (mistake === text || (await faults(mistake)).length === 0) {
      console.error('the parser accepts a mistake, so it checks nothing');
      process.exit(1);
    }
  }
  console.log(`${file} is valid`);
}

main(process.argv[2]);
