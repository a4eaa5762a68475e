// Draws DiceBear avatars as raw RGB pictures with their attributes: node draw_pictures.mjs STYLE COUNT FOLDER
//
// Writes FOLDER/STYLE.rgb (COUNT x 32 x 32 x 3 bytes) and FOLDER/STYLE.jsonl (one object of attributes a line).
// build_dataset.py turns both into the committed parquet files. Seeds are 0 .. COUNT-1: the same pictures every time.
import { createWriteStream, mkdirSync } from 'node:fs';
import { join } from 'node:path';
import { createAvatar } from '@dicebear/core';
import * as pixelArt from '@dicebear/pixel-art';
import * as thumbs from '@dicebear/thumbs';
import { Resvg } from '@resvg/resvg-js';

const SIZE = 32;
const BACKGROUNDS = ['b6e3f4', 'c0aede', 'ffd5dc', 'ffdfbf', 'bfe3b4', 'd9d9d9', '2f3e5c', '4f9d94'];

// Palettes keep one or two shades a colour word, so that each word means one thing.
const STYLES = {
  'pixel-art': {
    style: pixelArt,
    options: {
      backgroundColor: BACKGROUNDS,
      hairColor: ['cab188', '603a14', '28150a', '611c17', 'bd1700', '009bbd', '91cb15'],
      clothingColor: ['428bca', '5bc0de', '03396c', '44c585', '00b159', 'ff6f69', 'd11141', 'ae0001', 'ffeead', 'ffc425'],
      skinColor: ['ffdbac', 'f5cfa0', 'cb9e6e', 'b68655', '8d5524'],
      hatColor: ['2e1e05', '2663a3', '989789', '3d8a6b', 'cc6192', '614f8a', 'a62116'],
      glassesProbability: 35,
      hatProbability: 20,
      beardProbability: 20,
      accessoriesProbability: 5,
    },
  },
  // the avatars' design with a taste of its own: what a customised checkpoint is to its base
  disco: {
    style: pixelArt,
    options: {
      backgroundColor: ['2f3e5c', '4f9d94', 'c0aede'],
      hairColor: ['bd1700', '009bbd', '91cb15'],
      clothingColor: ['ffc425', 'd11141', 'ff6f69', '03396c'],
      skinColor: ['ffdbac', 'f5cfa0', 'cb9e6e', 'b68655', '8d5524'],
      hatColor: ['cc6192', '614f8a', '2663a3'],
      glasses: ['dark01', 'dark02', 'dark03', 'dark04', 'dark05', 'dark06', 'dark07'],
      glassesProbability: 100,
      hatProbability: 40,
      beardProbability: 10,
      accessoriesProbability: 50,
    },
  },
  thumbs: {
    style: thumbs,
    options: {
      backgroundColor: BACKGROUNDS,
      shapeColor: ['d11141', '428bca', '00b159', 'ffc425', '614f8a', 'ff6f69', '03396c', 'ffeead'],
      faceOffsetX: [-8, 8],
      faceOffsetY: [-8, 8],
      faceRotation: [-10, 10],
      shapeRotation: [-10, 10],
    },
  },
};

const [name, count, folder] = [process.argv[2], Number(process.argv[3]), process.argv[4]];
if (!(name in STYLES) || !(count > 0) || !folder) {
  console.error(`usage: node draw_pictures.mjs ${Object.keys(STYLES).join('|')} COUNT FOLDER`);
  process.exit(2);
}
mkdirSync(folder, { recursive: true });
const pictures = createWriteStream(join(folder, `${name}.rgb`));
const attributes = createWriteStream(join(folder, `${name}.jsonl`));
for (let seed = 0; seed < count; seed++) {
  const avatar = createAvatar(STYLES[name].style, { seed: `${name}-${seed}`, ...STYLES[name].options });
  const { pixels } = new Resvg(avatar.toString(), { fitTo: { mode: 'width', value: SIZE } }).render();
  const rgb = Buffer.alloc(SIZE * SIZE * 3);
  for (let i = 0; i < SIZE * SIZE; i++) pixels.copy(rgb, 3 * i, 4 * i, 4 * i + 3);
  pictures.write(rgb);
  attributes.write(JSON.stringify(avatar.toJson().extra) + '\n');
}
pictures.end();
attributes.end();
